"""The server's settings. A flag wins over its variable `SLSNET_…`, which wins over the default.

Variables, flags, `--help` and the documentation's table are made from the fields of `Settings`.
"""

import argparse
import re
from collections.abc import Container, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.metadata import read_metadata
from common.program import Help, program
from engines.plan import Precision
from photos.image import DEFAULT_MAX_PIXELS
from server.cores import available_cores

__all__ = [
    "DEFAULT_NETWORK",
    "NETWORK_NAME",
    "NETWORK_NAMES",
    "Settings",
    "add_flags",
    "name_in",
    "read_settings",
    "settings_of",
    "settings_table",
]

_PREFIX = "SLSNET_"
_LARGEST_NUMBER = 1e9
_LARGEST_INTEGER = 2**53
_MOST_THREADS = 1024
SHIPPED_MODEL = Path("model/weights/slsnet.onnx")

DEFAULT_NETWORK = "slsnet"
"""Name of the default network, unless its file says that it holds another one than SLSNet."""

NETWORK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The form of a network's name: a segment of a path, a value in a query, a label of metrics."""

# As browsers write it; `*` is all, and pages without an address of their own have `null`.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")

NETWORK_NAMES = "a name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with"
NETWORK_NAMES += " a letter or a digit"


def name_in(file: Path) -> str:
    """What the network in this file is called as the default one.

    Files of SLSNet name no network, whatever their title is.
    """
    try:
        # A pipe would keep the server waiting, and a device has no end.
        said = read_metadata(file).get("network", "") if file.is_file() else ""
    except (OSError, ValueError):
        # Why it is no network is said by whoever loads it.
        said = ""
    return said if NETWORK_NAME.fullmatch(said) else DEFAULT_NETWORK


class Settings(BaseSettings):
    """The server's settings; each field is a flag and an environment variable."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port for V2 over gRPC; none if not given (needs requirements-grpc.txt)",
    )
    model: Path = Field(
        Path(__file__).parent.parent / SHIPPED_MODEL,
        description="the network, an ONNX file; as a flag NAME=FILE is a further one, and the flag"
        " may come several times",
    )
    models: str = Field(
        "",
        description="further networks, NAME=FILE with commas between, for requests with model=NAME",
    )
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt", "torch"] = Field(
        "auto",
        description="what runs the network: onnxruntime, openvino (needs requirements-openvino.txt,"
        " and a CPU that multiplies bfloat16), tensorrt or torch; auto is TensorRT where it works,"
        " or else ONNX Runtime",
    )
    precision: Precision = Field(
        "fp16", description="precision of the TensorRT engine: fp32, tf32, fp16, bf16 or int8"
    )
    engine_dir: Path = Field(
        Path("~/.cache/slsnet"),
        description="where TensorRT engines are kept; servers on one machine may share it",
    )
    workers: int = Field(
        1,
        ge=1,
        le=_MOST_THREADS,
        description="processes that serve; each has its own limits",
    )
    share_network: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether workers send photos to one process that runs the network, or each has"
        " its own: yes, no, or auto, which shares it on a GPU",
    )
    threads: int = Field(
        0,
        ge=0,
        le=_MOST_THREADS,
        description="CPU threads of a lone photo, and photos that run at the same time;"
        " 0 is one for each core",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        le=_MOST_THREADS,
        description="threads that decode photos and encode masks; 0 is one for each core",
    )
    decode: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="what decodes usual JPEG files: cpu or gpu (needs requirements-decode.txt);"
        " the CPU decodes all others",
    )
    max_batch: int = Field(
        0,
        ge=0,
        description="most photos in one run of the network; 0 leaves it to the"
        " backend, 1 turns batching off",
    )
    max_wait_ms: float = Field(
        0,
        ge=0,
        description="how long an idle network waits for a batch to fill; every lone request is"
        " delayed as long",
    )
    max_queue: int = Field(
        256, ge=1, description="requests being worked on or waiting; more are refused with 429"
    )
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, description="largest request body; larger ones are refused with 413"
    )
    max_bytes_in_flight: int = Field(
        512 * 2**20,
        ge=1,
        description="bytes of all request bodies together; beyond it requests are refused with 429",
    )
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS,
        ge=1,
        description="largest photo, width × height; larger ones are refused with 413",
    )
    max_pixels_decoding: int = Field(
        256_000_000,
        ge=1,
        description="pixels of all photos being decoded at once; more wait",
    )
    max_connections: int = Field(
        1024,
        ge=1,
        description="connections held; more are refused with 503, unless they ask for health or"
        " metrics",
    )
    max_header_bytes: int = Field(
        32 * 2**10, ge=1024, description="path and headers together; more are refused with 431"
    )
    head_timeout_s: float = Field(
        10, gt=0, description="time for a request's headers to arrive; later they get 408"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="how long a connection may be idle between two requests"
    )
    stall_timeout_s: float = Field(
        10,
        gt=0,
        description="a body or answer slower than min-bytes-per-s for this long is cut off; so is"
        " the rest of a refused body",
    )
    min_bytes_per_s: int = Field(
        1024, ge=1, description="least rate at which a body must come and an answer must be read"
    )
    request_timeout_ms: float = Field(
        30_000,
        gt=0,
        description="deadline of a request without X-Request-Timeout-Ms, and the longest that one"
        " may ask for",
    )
    api_keys_file: Path | None = Field(
        None,
        description="file of API keys, made with `python -m server.keys new NAME` and read again"
        " when it changes; without it everybody may use the server",
    )
    key_requests_per_s: float = Field(
        0, ge=0, description="requests that each key may send in the long run; 0 is no limit"
    )
    key_burst: int = Field(
        20, ge=1, description="requests that each key may send at once before that limit holds"
    )
    key_streams: int = Field(
        0,
        ge=0,
        description="WebSockets at /stream that one key may have open, in each worker; more are"
        " refused with 429; 0 is no limit but `streams`",
    )
    metrics_keyed: bool = Field(False, description="whether /metrics needs a key too")
    cors_origins: str = Field(
        "",
        description="origins whose pages may use the API from a browser, with commas between; none"
        " by default",
    )
    cors_private_network: bool = Field(
        False,
        description="whether those pages may come from public addresses to a server on a private"
        " one",
    )
    device_dir: Path | None = Field(
        None,
        description="folder that `python -m server.static` wrote; the page then offers to compute"
        " in the browser",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="path prefix of the server behind a proxy, such as /slsnet; only needed if the"
        " proxy does not strip it",
    )
    tls_cert: Path | None = Field(
        None, description="certificate chain (PEM); the port then speaks TLS"
    )
    tls_key: Path | None = Field(
        None, description="its private key (PEM); none if the certificate's file has it"
    )
    tls_client_ca: Path | None = Field(
        None, description="clients must show a certificate from one of these (PEM): mutual TLS"
    )
    streams: int = Field(
        32, ge=1, description="WebSockets at /stream that are open; more are refused with 429"
    )
    stream_frame_bytes: int = Field(
        8 * 2**20,
        ge=1024,
        description="largest frame of a stream; a larger one ends it, with close code 1009",
    )
    stream_frames_per_s: int = Field(
        120, ge=1, description="frames that one stream may send in a second; more end it with 429"
    )
    bulk_max_bytes: int = Field(
        256 * 2**20, ge=1, description="largest body with several photos, all of them together"
    )
    bulk_max_photos: int = Field(1000, ge=1, description="most photos in one request")
    bulk_timeout_ms: float = Field(
        600_000, gt=0, description="as request-timeout-ms, for a request with several photos"
    )
    drain_grace_s: float = Field(
        1,
        ge=0,
        description="after SIGTERM, how long new requests are still served while readiness says"
        " 503",
    )
    drain_timeout_s: float = Field(
        60, gt=0, description="after that, how long what is in flight may take to finish"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="form of the log on stderr: text or json, one line a message"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe message that is logged: debug, info, warning or error"
    )

    @property
    def networks(self) -> dict[str, Path]:
        """The file of each network by its name, the default one first."""
        networks = {self._default_name: self.model}
        for entry in filter(None, self.models.split(",")):
            name, is_named, file = entry.partition("=")
            if not is_named or not file:
                raise ValueError(f"{entry!r} is not NAME=FILE (--model, --models, SLSNET_MODELS)")
            if not NETWORK_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name of a network: {NETWORK_NAMES} (a file with = in its path"
                    " begins with ./ or /)"
                )
            if name in networks:
                what = ", which is the default network" if name == self._default_name else ""
                raise ValueError(f"two networks are called {name!r}{what}: give one another name")
            networks[name] = Path(file)
        return networks

    @cached_property
    def _default_name(self) -> str:
        # Found once: requests go on to mean the same network, whatever its file becomes.
        return name_in(self.model)

    @property
    def origins(self) -> list[str]:
        """The origins whose pages may use the API; `*` is all."""
        return _listed(self.cors_origins)

    @property
    def bulk_queue(self) -> int:
        """The part of `max_queue` that bulk may fill; also the most images of one request."""
        return max(1, self.max_queue // 2)

    @property
    def bulk_bytes(self) -> int:
        """The part of `max_bytes_in_flight` that bulk may fill."""
        return self.max_bytes_in_flight // 2

    def timeout_s(self, asked_ms: float | None) -> float:
        """Seconds for a request that asks for `asked_ms` (`X-Request-Timeout-Ms`)."""
        return min(asked_ms or self.request_timeout_ms, self.request_timeout_ms) / 1000

    @property
    def cores(self) -> int:
        """Cores that each worker may use."""
        return max(1, available_cores() // self.workers)

    @property
    def decoders(self) -> int:
        """Threads of each worker that decode photos."""
        return self.decode_threads or self.cores

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if not host.strip():
            # A socket would take it for every address.
            raise ValueError("it is empty: leave it out for the default, 127.0.0.1")
        return host

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str) -> str:
        for origin in _listed(origins):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin as browsers send it, such as https://clinic.example"
                    " or http://localhost:3000"
                )
        return origins

    @field_validator("*")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        # Timers take no larger number.
        most = {int: _LARGEST_INTEGER, float: _LARGEST_NUMBER}.get(type(value))
        if most is not None and value > most:
            raise ValueError(f"it should be at most {most:g}")
        return value

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        # It raises what is wrong with them.
        _ = self.networks
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.tls_cert is None and (self.tls_key or self.tls_client_ca):
            raise ValueError("--tls-key and --tls-client-ca need --tls-cert")
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.port and self.port == self.grpc_port:
            raise ValueError(f"--port and --grpc-port are both {self.port}: each needs its own")
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if self.metrics_keyed and self.api_keys_file is None:
            raise ValueError(
                "--metrics-keyed needs --api-keys-file: without keys all may read them"
            )
        return self

    @property
    def doubts(self) -> list[str]:
        """What is hardly meant so, in words: settings that others make useless, or worse."""
        found = [
            f"{_flag(most)} ({getattr(self, most)}) is below {_flag(one)} ({getattr(self, one)}):"
            " what is larger is refused as if there were no room just now"
            for most, one in _BOUNDS
            if getattr(self, most) < getattr(self, one)
        ]
        if self.api_keys_file is None:
            found += [
                f"{_flag(name)} limits nobody: there is no --api-keys-file"
                for name in ("key_requests_per_s", "key_streams")
                if getattr(self, name)
            ]
        return found

    def bulk_timeout_s(self, asked_ms: float | None) -> float:
        """Seconds for a request with several photos that asks for `asked_ms`."""
        return min(asked_ms or self.bulk_timeout_ms, self.bulk_timeout_ms) / 1000


_BOUNDS = (
    ("max_bytes_in_flight", "max_body_bytes"),
    ("max_pixels_decoding", "max_pixels"),
)
"""Settings of all requests together, and of one of them."""

_DESCRIPTION = """
Serve SLSNet: a photo of a skin lesion in, its mask out.

    %(prog)s                   # at http://127.0.0.1:8000, until Ctrl-C
    %(prog)s --host 0.0.0.0 --port 80 --api-keys-file keys.txt
    curl -F file=@lesion.jpg localhost:8000/segment -o mask.png
"""


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags (`arguments`, default `sys.argv`), then the environment.

    If a value is out of range, it exits with 2 and names the flag and the variable.
    """
    parser = argparse.ArgumentParser(
        formatter_class=Help,
        prog=program("server"),
        description=_DESCRIPTION,
        epilog="Each flag can also be given as the environment variable shown beside it; the flag"
        " wins.",
    )
    add_flags(parser, Settings.model_fields)
    shipped = _shipped()
    parser.add_argument(
        "--network",
        choices=shipped,
        metavar="NAME",
        help="the shipped network that is the default one, in place of --model:"
        f" {', '.join(shipped)}",
    )
    given = vars(parser.parse_args(arguments))
    if name := given.pop("network"):
        given["model"] = [*given.get("model", []), str(shipped[name])]
    return settings_of(parser, given)


def _shipped() -> dict[str, Path]:
    """The files of the networks that come with this package, by their names."""
    folder = (Path(__file__).parent.parent / SHIPPED_MODEL).parent
    return {file.stem: file for file in sorted(folder.glob("*.onnx"))}


def add_flags(parser: argparse.ArgumentParser, names: Container[str]) -> None:
    """Add the flags of the settings `names`; only those given are in the parsed namespace."""
    for flag, variable, default, description in settings_table():
        if (name := flag.removeprefix("--").replace("-", "_")) in names:
            shown = f"default {default}, {variable}" if default else variable
            help_text = f"{description} ({shown})".replace("%", "%%")
            repeats = name == "model" and "models" in names
            parser.add_argument(
                flag,
                help=help_text,
                metavar="VALUE",
                default=argparse.SUPPRESS,
                dest=name,
                action="append" if repeats else "store",
            )


def settings_of(parser: argparse.ArgumentParser, given: dict[str, Any]) -> Settings:
    """Settings from parsed flags, then the environment; exits with 2 if a value is out of range."""
    try:
        return Settings(**_by_name(parser, given))
    except ValidationError as error:
        parser.error("; ".join(_told(problem) for problem in error.errors()))


def _by_name(parser: argparse.ArgumentParser, given: dict[str, Any]) -> dict[str, Any]:
    """Parsed flags, with the `--model NAME=FILE` among them as `models`."""
    if not isinstance(entries := given.get("model"), list):
        return given
    default = [entry for entry in entries if _is_unnamed(entry)]
    further = [given["models"]] if "models" in given else []
    for entry in entries:
        name, _, file = entry.partition("=")
        if _is_unnamed(entry):
            continue
        if name == DEFAULT_NETWORK and not default:
            default.append(file)
        else:
            further.append(entry)
    if len(default) > 1:
        parser.error(
            f"--model: there is one default network, got {' and '.join(default)}: give the others a"
            " name, as NAME=FILE"
        )
    named = {"models": ",".join(further)} if further else {}
    others = {name: value for name, value in given.items() if name not in ("model", "models")}
    return {**others, **named, **({"model": default[0]} if default else {})}


def _is_unnamed(entry: str) -> bool:
    """Whether a `--model` is the default one's file, and no NAME=FILE."""
    return "=" not in entry or entry.startswith(("./", "/"))


def _listed(origins: str) -> list[str]:
    return [origin.strip() for origin in origins.split(",") if origin.strip()]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _told(problem: ErrorDetails) -> str:
    if not problem["loc"]:
        return problem["msg"]
    name = str(problem["loc"][0])
    return f"{_flag(name)} ({_PREFIX}{name.upper()}): {problem['msg']}, got {problem['input']!r}"


def settings_table() -> list[tuple[str, str, str, str]]:
    """Flag, environment variable, default and meaning of every setting."""
    return [
        (
            _flag(name),
            f"{_PREFIX}{name.upper()}",
            str(SHIPPED_MODEL) if name == "model" else str(field.default).lower(),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
