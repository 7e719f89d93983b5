"""Class lists and index.json: read right in every way that people write them, or refused by name."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from ttt_adapt.data import LabelledClip, StillsDataset, open_clips
from ttt_adapt.data.classes import class_names, ignore_id
from ttt_adapt.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


@pytest.mark.parametrize(
    "given",
    [
        ["sky", "road"],
        ("sky", "road"),
        np.array(["sky", "road"]),
        iter(["sky", "road"]),
        {"0": "sky", "1": "road"},
        {1: "road", 0: "sky"},
        {"road": 1, "sky": 0},
        {"road": "1", "sky": "0"},
        [{"id": 1, "name": "road"}, {"id": 0, "name": "sky"}],
    ],
)
def test_lists_and_mappings_give_names_in_the_order_of_the_ids(given):
    assert class_names(given, "here") == ("sky", "road")


@pytest.mark.parametrize("given", [None, [], {}, ()])
def test_nothing_is_no_names(given):
    assert class_names(given, "here") == ()


def test_ids_of_two_digits_are_ordered_as_numbers():
    names = [f"class {number}" for number in range(12)]
    assert class_names({str(number): name for number, name in enumerate(names)}, "here") == tuple(names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sky, road", r"'sky, road', a text; expected a list of names"),
        (b"sky", "a text"),
        ({"sky", "road"}, "a set; expected a list"),
        (7, "7, a int"),
        (["sky", 5], "the name of class 1 is 5"),
        (["sky", None], "the name of class 1 is None"),
        (["sky", " "], "the name of class 1 is ' '"),
        (["sky", ["road"]], r"the name of class 1 is \['road'\]"),
        (["sky", "road", "sky"], "'sky' comes twice, for the ids 0 and 2"),
        ([f"c{n}" for n in range(300)], "300 class names; labels hold ids from 0 to 255"),
        ({"0": "sky", "2": "road"}, "the ids of the class names are 0, 2; expected 0 to 1"),
        ({"sky": 1, "road": 2}, "are 1, 2; expected 0 to 1"),
        ({"sky": 0, "road": 0}, "are 0, 0; expected 0 to 1"),
        ({"sky": "blue", "road": "grey"}, "are blue, grey; expected 0 to 1"),
        ({"0": 5, "1": 6}, "the name of class 0 is 5"),
        ([{"id": 0, "name": "sky"}, {"name": "road"}], "are 0, None; expected 0 to 1"),
        ([{"id": 0, "name": 3}], "the name of class 0 is 3"),
    ],
)
def test_what_is_no_class_list_is_refused_by_name(given, message):
    with pytest.raises(DataError, match=rf"^here: .*{message}"):
        class_names(given, "here")


def test_256_classes_are_as_many_as_labels_hold():
    assert len(class_names([f"c{n}" for n in range(256)], "here")) == 256


@pytest.mark.parametrize(("given", "expected"), [(None, 255), (0, 0), (254, 254), (255.0, 255)])
def test_an_ignore_id_is_a_byte_and_null_is_255(given, expected):
    assert ignore_id(given, "here") == expected


@pytest.mark.parametrize("given", [-1, -100, 256, "255", True, 1.5, [255], float("nan"), {}])
def test_what_is_no_ignore_id_is_refused_by_name(given):
    with pytest.raises(DataError, match="^here: the ignore id is .*from 0 to 255"):
        ignore_id(given, "here")


# ---- index.json


def write(root, index, count=2, ids=None):
    """One clip, whose labels are `ids` of its frames, beside an index."""
    for part in ("images", "labels"):
        (root / "street" / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(root / "street" / "images" / f"{number}.png")
        label = np.full((6, 8), number if ids is None else ids[number], np.uint8)
        Image.fromarray(label).save(root / "street" / "labels" / f"{number}.png")
    (root / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return root / "street"


@pytest.mark.parametrize("classes", [["a", "b"], {"0": "a", "1": "b"}, {"b": 1, "a": 0}])
def test_an_index_may_give_its_classes_as_a_list_or_a_mapping_and_its_ignore_id_as_null(tmp_path, classes):
    clip = LabelledClip(write(tmp_path, {"classes": classes, "ignore": None}))
    assert (clip.classes, clip.ignore) == (("a", "b"), 255)
    assert int(clip[1][1].max()) == 1


def test_an_index_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    assert LabelledClip(write(tmp_path, '\ufeff{"classes": ["a", "b"]}')).classes == ("a", "b")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"classes": "sky"}, "'sky', a text"),
        ({"classes": ["a", "a"]}, "'a' comes twice"),
        ({"classes": ["a", "b"], "ignore": "255"}, "the ignore id is '255'"),
        ({"classes": ["a", "b"], "clips": {}}, r"clips is \{\}; expected a list"),
        ({"classes": ["a", "b"], "clips": ["street"]}, r"clips is \['street'\]; expected a list of objects"),
        (
            {"classes": ["a", "b"], "clips": [{"clip": "street", "label_gap_s": "1"}]},
            "label_gap_s of clip street is '1'",
        ),
        ({"classes": ["a", "b"], "clips": [{"clip": "street", "label_gap_s": -1}]}, "label_gap_s of clip street is -1"),
        ({"classes": ["a", "b"], "clips": [{"clip": "street", "frames": 3}]}, "frames of clip street is 3"),
        (
            {"classes": ["a", "b"], "clips": [{"clip": "street", "frames": [{"frame": "0.png", "t": "now"}]}]},
            r"t of frame 0\.png is 'now'; expected seconds",
        ),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_index_is_refused_with_its_file_and_the_wrong_part(tmp_path, index, message):
    with pytest.raises(DataError, match=rf"index\.json.*{message}"):
        LabelledClip(write(tmp_path, index))


def test_an_index_without_classes_is_named_where_classes_are_missing(tmp_path):
    with pytest.raises(DataError, match=r"classes of .*street are unknown.*index\.json is there, and has no classes"):
        LabelledClip(write(tmp_path, {"names": ["a", "b"]}))


def test_class_names_that_are_given_take_the_place_of_wrong_ones(tmp_path):
    assert LabelledClip(write(tmp_path, {"classes": "sky"}), classes=("a", "b")).classes == ("a", "b")
    with pytest.raises(DataError, match=r"clip .*street: the class names are 'a,b', a text"):
        LabelledClip(tmp_path / "street", classes="a,b")


# ---- labels and names


def test_names_that_no_label_has_are_said_once_for_all_stills(tmp_path):
    clips = open_clips(write(tmp_path, {"classes": ["sky", "road", "car", "tree"]}).parent)
    with pytest.warns(
        UserWarning, match=r"labels hold class ids up to 1, and there are 4 class names: .*'car', 'tree'"
    ):
        StillsDataset(clips)


@pytest.mark.parametrize("ids", [(0, 1), (1, 255), (1, 1)])
def test_labels_that_reach_the_last_name_are_no_reason_for_a_word(tmp_path, ids):
    clips = open_clips(write(tmp_path, {"classes": ["sky", "road"]}, ids=ids).parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StillsDataset(clips)


def test_a_still_of_another_size_is_named_with_its_file_and_the_first_one(tmp_path):
    clip = write(tmp_path, {"classes": ["a", "b"]})
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(clip / "images" / "1.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(clip / "labels" / "1.png")
    with pytest.raises(DataError, match=r"sample 1 \(.*1\.png\) has shape \(4, 4, 3\).*\(6, 8, 3\).*0\.png"):
        StillsDataset(open_clips(tmp_path))
