"""The server's routes. Bodies are read and checked in the event loop; all work with the model waits for the worker."""

# Annotations of routes are read when the routes are made, where their packages are imported: they are no text here.

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ttt_adapt.errors import TTTAdaptError, missing
from ttt_adapt.serve.access import Door
from ttt_adapt.serve.answers import MEDIA_TYPES, Form
from ttt_adapt.serve.bodies import body, check_media_type, chunks, text_field
from ttt_adapt.serve.described import (
    BINARY,
    NAME,
    NAMES,
    SOURCE,
    STATE_TYPE,
    STATS,
    STATUS,
    answer,
    errors,
    fields,
    takes,
    text,
)
from ttt_adapt.serve.refusal import Refusal, refusal_of
from ttt_adapt.serve.service import Service
from ttt_adapt.serve.streams import Prediction, Served

PICTURES = ["image/jpeg", "image/png"]
_ASKED = (401, 403, 429, 503)
"""Statuses that every route with the model may have."""
_PREDICTION = answer(200, "the prediction", image__png=BINARY, application__octet_stream=BINARY)
_STATS = answer(200, "the stream's counters", application__json=STATS)


def make_app(service: Service, token: str | None = None) -> Any:
    """The server as an ASGI application; it ends the service's worker when it stops.

    Raises:
        MissingPackageError: `fastapi` is not installed.
    """
    try:
        import fastapi
    except ImportError as error:
        raise missing("fastapi", "serve") from error

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        yield
        await service.stop()

    about = "Streams that adapt one model: open one, post its frames, get predictions."
    app = fastapi.FastAPI(
        title="ttt-adapt", version="1", description=about, docs_url=None, redoc_url=None, lifespan=life,
        redirect_slashes=False,
    )  # fmt: skip
    app.add_middleware(Door, token=token, limits=service.limits, metrics=service.metrics)
    _answer_errors_alike(app)
    needed: list[Any] = []
    if token is not None:  # the door checks it; this tells it
        from fastapi.security import HTTPBearer

        needed = [fastapi.Depends(HTTPBearer(auto_error=False))]
    _watching_routes(app, service, needed)
    for routes in (_stream_routes, _frame_routes, _state_routes, _source_routes):
        router = fastapi.APIRouter(prefix="/v1/streams", dependencies=needed)
        routes(router, service)
        app.include_router(router)
    return app


def _answer_errors_alike(app: Any) -> None:
    """Give all errors the one shape."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def refused(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(TTTAdaptError)
    async def _ours(_: Any, error: TTTAdaptError) -> JSONResponse:
        return refused(refusal_of(error))

    @app.exception_handler(RequestValidationError)
    async def _arguments(_: Any, error: RequestValidationError) -> JSONResponse:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return refused(Refusal(422, "bad_request", "; ".join(wrong)))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "no_such_method"}.get(error.status_code, "bad_request")
        answered = refused(Refusal(error.status_code, code, str(error.detail)))
        if error.status_code == 405:  # each method has a route of its own, and knows of no other
            known = app.openapi()["paths"].get(request.scope["route"].path, {})
            answered.headers["Allow"] = ", ".join(sorted(method.upper() for method in known))
        return answered


def _watching_routes(app: Any, service: Service, needed: list[Any]) -> None:
    """What watches the process: is it there, does it work, what did it do."""
    from fastapi.responses import JSONResponse, Response

    @app.get("/health", response_class=JSONResponse, responses=answer(200, "it lives", application__json=STATUS))
    async def health() -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "ok"})

    ready_answers = {**answer(200, "it takes frames", application__json=STATUS), **errors(503)}

    @app.get("/ready", response_class=JSONResponse, responses=ready_answers)
    async def ready() -> Response:
        """Whether the model takes frames."""
        if not service.worker.alive:
            raise Refusal(503, "stopping", "the server is stopping", retry_after=5)
        return JSONResponse({"status": "ready"})

    counters = {**answer(200, "counters", text__plain=text()), **errors(401, 403, 429)}

    @app.get("/metrics", response_class=Response, dependencies=needed, responses=counters)
    async def metrics() -> Response:
        """Counters, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _stream_routes(router: Any, service: Service) -> None:
    """Opening, looking, beginning anew, closing."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    streams = service.streams

    @router.get("", responses={**answer(200, "names", application__json=NAMES), **errors(401, 403, 429)})
    async def list_streams() -> Response:
        """The names of the streams that are open."""
        return JSONResponse({"streams": streams.names})

    opened = answer(201, "it is open, at its beginning", application__json=STATS)

    @router.post(
        "", status_code=201, responses={**opened, **errors(*_ASKED, 400, 408, 409, 413, 415, 422)},
        openapi_extra=takes(["application/json"], fields(name=text(pattern=f"^{NAME}$"))),
    )  # fmt: skip
    async def open_stream(request: Request) -> Response:
        """Open a stream."""
        name = await text_field(request, "name", NAME, service.limits.body_seconds)
        served = await service.run(partial(streams.open, name))
        return JSONResponse(served.stats, 201, {"Location": f"/v1/streams/{name}"})

    @router.get("/{name}", responses={**_STATS, **errors(401, 403, 404, 429)})
    async def stream_stats(name: str) -> Response:
        """What became of the stream's frames."""
        return JSONResponse(streams.find(name).stats)

    @router.post("/{name}/reset", responses={**_STATS, **errors(*_ASKED, 404, 409)})
    async def reset_stream(name: str) -> Response:
        """Begin a new video, with the source weights."""
        return JSONResponse((await service.run(partial(streams.reset, name))).stats)

    closed = answer(204, "it is closed")

    @router.delete("/{name}", status_code=204, response_class=Response, responses={**closed, **errors(*_ASKED, 404)})
    async def close_stream(name: str) -> Response:
        """Let go of the stream, and of what it learned."""
        await service.run(partial(streams.close, name))
        return Response(status_code=204)


def _frame_routes(router: Any, service: Service) -> None:
    """Frames in, predictions out."""
    from fastapi import Request
    from fastapi.responses import Response

    streams, limits = service.streams, service.limits

    def in_time(served: Served) -> None:
        wait = served.rate.wait(asyncio.get_running_loop().time())
        if wait:
            raise Refusal(429, "too_fast", f"a stream takes {limits.rate:g} frames a second: wait", wait)

    @router.post(
        "/{name}/frames", response_class=Response,
        responses={**_PREDICTION, **errors(*_ASKED, 400, 404, 408, 409, 413, 415, 422)},
        openapi_extra=takes(PICTURES, BINARY),
    )  # fmt: skip
    async def post_frame(request: Request, name: str, answer: Form = "png", adapt: bool = True) -> Response:
        """Adapt to a frame and predict it; with adapt=false predict it only."""
        served = streams.find(name)
        check_media_type(request, PICTURES)
        service.worker.check_room()
        in_time(served)
        picture = await body(request, limits.frame_bytes, limits.body_seconds)
        made = await service.run(partial(streams.post, name, picture, answer, adapt))
        return Response(made.content, media_type=MEDIA_TYPES[answer], headers=_about(made))

    @router.get(
        "/{name}/prediction", response_class=Response, responses={**_PREDICTION, **errors(*_ASKED, 404, 409, 422)}
    )
    async def latest_prediction(name: str, answer: Form = "png") -> Response:
        """The prediction for the last frame of the stream's source."""
        content = await service.run(partial(streams.latest, name, answer))
        return Response(content, media_type=MEDIA_TYPES[answer])


def _about(made: Prediction) -> dict[str, str]:
    """The headers of a prediction."""
    headers = {"TTT-Adapted": str(made.adapted).lower()}
    if made.frame is not None:
        headers["TTT-Frame"] = str(made.frame)
    return headers | ({"TTT-Reason": made.reason} if made.reason else {})


def _state_routes(router: Any, service: Service) -> None:
    """The state of a stream, to keep and to go on from."""
    from fastapi import Request
    from fastapi.responses import FileResponse, JSONResponse, Response

    streams, limits = service.streams, service.limits

    class Once(FileResponse):
        """A file that goes with its folder when it was sent, or could not be."""

        folder: tempfile.TemporaryDirectory[str]

        async def __call__(self, *arguments: Any) -> None:
            try:
                await super().__call__(*arguments)
            finally:
                await asyncio.to_thread(self.folder.cleanup)

    saved = answer(200, "its state", application__octet_stream=BINARY)

    @router.get("/{name}/state", response_class=FileResponse, responses={**saved, **errors(*_ASKED, 404, 409, 422)})
    async def get_state(name: str) -> Response:
        """All that the stream learned, to go on from it later: a safetensors file."""
        folder = tempfile.TemporaryDirectory(prefix="ttt-adapt-", ignore_cleanup_errors=True)
        path = Path(folder.name) / "state.safetensors"
        try:
            await service.run(partial(streams.save, name, path))
        except BaseException:
            folder.cleanup()
            raise
        file = Once(path, media_type=STATE_TYPE, filename=f"{name}.safetensors")
        file.folder = folder
        return file

    @router.put(
        "/{name}/state", responses={**_STATS, **errors(*_ASKED, 400, 404, 408, 409, 413, 415, 422)},
        openapi_extra=takes([STATE_TYPE], BINARY),
    )  # fmt: skip
    async def put_state(request: Request, name: str) -> Response:
        """Go on from a state that was kept; one that does not fit changes nothing."""
        streams.find(name)
        check_media_type(request, [STATE_TYPE])
        service.worker.check_room()
        with tempfile.NamedTemporaryFile(prefix="ttt-adapt-", suffix=".safetensors") as file:
            async for part in chunks(request, limits.state_bytes, limits.body_seconds):
                await asyncio.to_thread(file.write, part)
            await asyncio.to_thread(file.flush)
            served = await service.run(partial(streams.load, name, Path(file.name)))
        return JSONResponse(served.stats)


def _source_routes(router: Any, service: Service) -> None:
    """Sources that the server reads itself."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    begun = answer(202, "it is being opened", application__json=STATS)

    @router.put(
        "/{name}/source", status_code=202, responses={**begun, **errors(*_ASKED, 400, 404, 408, 409, 413, 415, 422)},
        openapi_extra=takes(["application/json"], fields(source=text(pattern=f"^{SOURCE}$"))),
    )  # fmt: skip
    async def put_source(request: Request, name: str) -> Response:
        """Let the server read a file or an address, as far as it was allowed when it was started."""
        service.streams.find(name)
        source = await text_field(request, "source", SOURCE, service.limits.body_seconds)
        served = await service.run(partial(service.watch, name, source))
        return JSONResponse(served.stats, 202)

    @router.delete("/{name}/source", responses={**_STATS, **errors(*_ASKED, 404)})
    async def stop_source(name: str) -> Response:
        """Stop reading; the stream stays."""
        return JSONResponse((await service.run(partial(service.streams.unwatch, name))).stats)
