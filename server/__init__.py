"""The service; `inference`, `backends`, `http`, `process` and `observe` are its rooms."""

import os

VERSION = "0.1.0"
"""The product's; the package and the API's document take it from here."""

# Where workers keep their metrics is the supervisor's to say (`server.observe.shared_metrics`).
# From elsewhere the library would take them for its own, and add figures of processes that are
# gone. It reads them when it is imported, so they go before any module of this package can do that.
os.environ.pop("prometheus_multiproc_dir", None)
if "SLSNET_METRICS_PLACE" not in os.environ:
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
