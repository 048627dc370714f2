"""The reference of `/stream`: an AsyncAPI document, made from the messages' types."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema
from starlette.datastructures import URL

from server.http.access import KEY_PROTOCOL
from server.http.answers import ProblemAnswer, SegmentationAnswer
from server.http.problems import STREAM_PROTOCOL
from server.http.stream.wishes import Wishes
from server.settings import Settings

__all__ = ["Failed", "Masked", "Ready", "asyncapi"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ready(_Message):
    """The first message: key and parameters are right, frames may come."""

    type: Literal["ready"] = "ready"
    request_id: str = Field(description="quote it in a report")
    deadline_ms: float = Field(description="of each frame, from its arrival")
    max_frame_bytes: int = Field(description="a larger frame ends the stream")
    max_frames_per_s: int = Field(description="more frames end the stream")

    @classmethod
    def of(cls, request_id: str, wishes: Wishes, settings: Settings) -> Self:
        """The limits that this stream has."""
        return cls(
            request_id=request_id,
            deadline_ms=settings.timeout_s(wishes.deadline_ms) * 1000,
            max_frame_bytes=settings.stream_frame_bytes,
            max_frames_per_s=settings.stream_frames_per_s,
        )


Dropped = Field(
    description="frames of this stream up to now that a newer one took the place of: those below"
    " `frame` that no message names"
)


class Masked(_Message):
    """A frame's mask."""

    type: Literal["mask"]
    frame: int = Field(ge=1, description="its number: the first frame is 1")
    dropped: int = Dropped
    total_ms: float = Field(description="milliseconds from the frame's arrival to this message")
    result: SegmentationAnswer


class Failed(_Message):
    """What is wrong with a frame, or why the stream ends."""

    type: Literal["error"]
    frame: int | None = Field(description="its number; null if the stream ends")
    dropped: int = Dropped
    retry_after_s: int | None = Field(description="seconds, if trying again may help")
    error: ProblemAnswer


_SAID = (Ready, Masked, Failed)

_HEADERS = {
    "type": "object",
    "properties": {
        "Sec-WebSocket-Protocol": {
            "type": "string",
            "description": f"`{STREAM_PROTOCOL}`; where the server has keys and no header can be"
            f" set, as in a browser, `{KEY_PROTOCOL}KEY` beside it",
            "examples": [STREAM_PROTOCOL, f"{STREAM_PROTOCOL}, {KEY_PROTOCOL}slsnet_…"],
        }
    },
}


def asyncapi(url: URL, version: str) -> dict[str, Any]:
    """The document.

    Args:
        url: where it was asked for.
        version: the server's.
    """
    said = [model.__name__ for model in _SAID]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "SLSNet Server: streams",
            "version": version,
            "description": "Frames of a camera in, masks out. The newest frame is segmented; one"
            " that waits when a newer one comes is dropped. Messages come in the frames' order."
            " Everything else is in the OpenAPI document. This is not a medical device.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "this": {
                "host": url.netloc,
                "pathname": url.path.removesuffix("/asyncapi.json") or "/",
                "protocol": "wss" if url.scheme == "https" else "ws",
                "security": [{"$ref": "#/components/securitySchemes/bearer"}],
            }
        },
        "channels": {
            "stream": {
                "address": "/stream",
                "messages": {
                    name: {"$ref": f"#/components/messages/{name}"} for name in ("Frame", *said)
                },
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "query": Wishes.model_json_schema(),
                        "headers": _HEADERS,
                        "bindingVersion": "0.1.0",
                    }
                },
            }
        },
        "operations": {
            "takeFrames": _operation("receive", ["Frame"]),
            "giveMasks": _operation("send", said),
        },
        "components": _components(),
    }


def _operation(action: Literal["receive", "send"], messages: list[str]) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": "#/channels/stream"},
        "messages": [{"$ref": f"#/channels/stream/messages/{name}"} for name in messages],
    }


def _components() -> dict[str, Any]:
    _, defined = models_json_schema(
        [(model, "serialization") for model in _SAID], ref_template="#/components/schemas/{model}"
    )
    frame = {
        "summary": "One frame, as a binary message: a photo's file, or bare pixels.",
        "contentType": "application/octet-stream",
        "payload": {"type": "string", "format": "binary"},
    }
    said = {
        model.__name__: {
            "summary": model.__doc__,
            "contentType": "application/json",
            "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        }
        for model in _SAID
    }
    return {
        "messages": {"Frame": frame, **said},
        "schemas": defined["$defs"],
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "description": "an API key"}
        },
    }
