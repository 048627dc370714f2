"""The server. docs/architecture.md has its packages, and a photo's way through them."""

import os

VERSION = "0.1.0"
"""The project's version; the package and the API's document take it from here."""

# Only the supervisor says where workers keep their metrics (`server.observe.shared_metrics`). A
# folder set elsewhere would add figures of processes that are gone. The library reads these
# variables when it is imported, so they are removed before.
os.environ.pop("prometheus_multiproc_dir", None)
if "SLSNET_METRICS_WORKER" not in os.environ:
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

# NumPy's BLAS starts a thread for each core when it is imported. All products of matrices here are
# too small for a second one. A user's own setting holds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
