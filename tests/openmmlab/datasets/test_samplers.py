"""Videos, the order of their frames, and whole videos to ranks."""

from __future__ import annotations

import itertools

import pytest
from mmengine.dataset import BaseDataset
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import DataLoader

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets import samplers
from ttt_adapt_openmmlab.datasets.frame_order import FrameOrder, frame_key, video_of
from ttt_adapt_openmmlab.datasets.samplers import VideoSampler, share_out


class Frames(BaseDataset):
    """Data infos only."""

    def __init__(self, infos, **kwargs):
        self.listed = infos
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self):
        return [dict(info) for info in self.listed]


def videos(**lengths: int) -> list[dict]:
    return [{"img_path": f"/data/{name}/{i:04d}.png"} for name, n in lengths.items() for i in range(n)]


def as_rank(monkeypatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(samplers, "get_dist_info", lambda: (rank, ranks))


def test_a_video_is_its_id_or_the_folder_of_its_frames():
    assert video_of({"video_id": 0, "img_path": "/a/b/1.png"}) == "0"
    assert video_of({"video_id": None, "img_path": "/a/b/1.png"}) == "/a/b"
    assert video_of({"img_path": "1.png"}) == "."
    with pytest.raises(DataError, match="meta_keys"):
        video_of({"ori_shape": (3, 4)})


def test_file_names_are_ordered_by_their_numbers():
    names = ["bar_2.png", "bar_10.png", "bar_10_b.png", "bar_11.png"]
    mixed = [names[i] for i in (3, 1, 0, 2)]
    assert sorted(mixed, key=lambda name: frame_key({"img_path": f"/x/{name}"})) == names
    assert frame_key({"img_path": "/x/9.png", "frame_id": 3}) < frame_key({"img_path": "/x/1.png", "frame_id": 4})


def test_frames_without_a_number_are_ordered_by_any_file_name_or_refused():
    assert frame_key({"img_path": "/x/a\u00b2_1.png"}) < frame_key({"img_path": "/x/a\u00b2_2.png"})
    for metainfo in ({"video_id": "a"}, {"video_id": "a", "frame_id": "first"}):
        with pytest.raises(DataError, match="frame of video 'a' has frame_id.*meta_keys"):
            frame_key(metainfo)


def test_every_frame_goes_to_one_rank_with_its_whole_video_in_order(monkeypatch):
    infos = videos(a=3, b=7, c=2, d=5)
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(list(VideoSampler(Frames(infos, lazy_init=True))))
    assert sorted(itertools.chain(*shares)) == list(range(17))
    owners = [{video_of(infos[i]) for i in share} for share in shares]
    assert not owners[0] & owners[1]
    assert all(share == sorted(share) for share in shares)
    assert [len(share) for share in shares] == [9, 8]  # b + c, d + a


def test_the_longest_video_goes_to_the_rank_with_the_fewest_frames():
    lengths = [4, 9, 1, 6, 5, 5]
    starts = list(itertools.accumulate([0, *lengths]))
    shares = share_out([list(range(a, b)) for a, b in itertools.pairwise(starts)], 3)
    assert [len(share) for share in shares] == [10, 10, 10]


def test_frames_are_sorted_even_if_the_dataset_mixes_videos():
    infos = [
        {"img_path": "x/10.png", "video_id": "v"},
        {"img_path": "y/1.png", "video_id": "w"},
        {"img_path": "x/9.png", "video_id": "v"},
    ]
    assert list(VideoSampler(Frames(infos))) == [2, 0, 1]


def test_two_samplers_agree_and_every_epoch_is_the_same():
    dataset = Frames(videos(a=3, b=2))
    one, other = VideoSampler(dataset, seed=1), VideoSampler(dataset, seed=2)
    one.set_epoch(3)
    assert list(one) == list(other) == list(one) == [0, 1, 2, 3, 4]
    assert len(one) == 5


def test_a_rank_without_a_video_has_an_empty_loader(monkeypatch):
    as_rank(monkeypatch, 2, 3)
    dataset = Frames(videos(a=3, b=2))
    loader = DataLoader(dataset, sampler=VideoSampler(dataset))
    assert len(loader) == 0
    assert list(loader) == []


def test_mmengine_builds_it_with_its_own_arguments():
    sampler = DATA_SAMPLERS.build(
        {"type": "VideoSampler", "shuffle": False}, default_args={"dataset": Frames(videos(a=2)), "seed": None}
    )
    assert list(sampler) == [0, 1]


def test_shuffling_and_datasets_without_videos_are_refused():
    with pytest.raises(ConfigError, match="shuffle=False"):
        VideoSampler(Frames(videos(a=2)), shuffle=True)
    with pytest.raises(DataError, match="get_data_info"):
        VideoSampler([1, 2, 3])


def follow(paths: list[str]) -> list[tuple[str, bool, str]]:
    order = FrameOrder()
    return [order.follow({"img_path": path}) for path in paths]


def test_a_video_begins_where_the_name_changes():
    seen = follow(["a/1.png", "a/2.png", "b/1.png", "b/3.png"])
    assert [new for _, new, _ in seen] == [True, False, True, False]
    assert [name for name, _, _ in seen] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("paths", [["a/2.png", "a/1.png"], ["a/1.png", "a/1.png"], ["a/f_10.png", "a/f_9.png"]])
def test_frames_that_go_back_are_refused(paths):
    with pytest.raises(DataError, match=f"{paths[1]} comes after {paths[0]}.*shuffled"):
        follow(paths)


def test_a_video_that_comes_back_is_refused():
    with pytest.raises(DataError, match="a/2.png.*interleaves"):
        follow(["a/1.png", "b/1.png", "a/2.png"])


@pytest.mark.parametrize(
    ("numbers", "warned_at"),
    [([1, 2, 4, 5, 9], [2]), ([1, 3, 4], [2]), ([0, 30, 60, 90], []), ([1, 2], []), ([5], [])],
)
def test_missing_frames_are_warned_of_once_per_video(numbers, warned_at):
    seen = follow([f"a/{n:04d}.png" for n in numbers])
    assert [i for i, (_, _, warning) in enumerate(seen) if warning] == warned_at
