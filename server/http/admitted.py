"""The routes whose requests take a place in the queue.

The router takes its paths from here, the `Door` refuses by it and Ray's gateway limits by it, so
that none of them can miss a route. A test posts to every route, and compares.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.http.openinference.protocol import INFER_PATHS, VERSION
from server.http.parameters import is_bulk
from server.settings import Settings

__all__ = ["ADMITTED", "BATCH", "BATCH_JSON", "SEGMENT", "SEGMENT_JSON", "Admitted", "admitted"]


@dataclass(frozen=True)
class Admitted:
    """A route that takes a place for each request."""

    path: str
    """Its path as the framework has it, by which requests are counted."""
    many: bool = False
    """Whether a request has several photos: then it is always bulk, and may take longer."""

    def timeout_s(self, settings: Settings, asked_ms: float | None) -> float:
        """Seconds that a request may take, which asks for so many milliseconds."""
        return (settings.bulk_timeout_s if self.many else settings.timeout_s)(asked_ms)

    def is_bulk(self, priority: str) -> bool:
        """Whether a request with this `Priority` header lets others go first."""
        return self.many or is_bulk(priority)


SEGMENT = Admitted("/segment")
SEGMENT_JSON = Admitted("/segment/json")
BATCH = Admitted("/segment/batch", many=True)
BATCH_JSON = Admitted("/segment/batch/json", many=True)

_BY_NAME, _WITH_VERSION = (Admitted(route) for route in INFER_PATHS.values())

ADMITTED: Mapping[str, Admitted] = {
    **{route.path: route for route in (SEGMENT, SEGMENT_JSON, BATCH, BATCH_JSON)},
    **dict(zip(INFER_PATHS, (_BY_NAME, _WITH_VERSION), strict=True)),
}
"""Each path that a request can be posted to, with its route; of networks the default one's."""

_OF_NETWORK = re.compile(rf"/v2/models/[^/]+(/versions/{VERSION})?/infer")


def admitted(path: str) -> Admitted | None:
    """The route of a request that is posted to `path`; None if it takes no place."""
    route = ADMITTED.get(path)
    if route is None and (of_network := _OF_NETWORK.fullmatch(path)):
        return _WITH_VERSION if of_network[1] else _BY_NAME
    return route
