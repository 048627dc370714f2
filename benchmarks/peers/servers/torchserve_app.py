"""TorchServe: https://pytorch.org/serve/batch_inference_with_ts.html, a worker for each core."""

import os
import subprocess
import sys
from pathlib import Path

from handler import MAX_BATCH, PORT, TIMEOUT_S, WORKERS

MAX_BATCH_DELAY_MS = 10
QUEUE = 256  # as long as this server's; the default of 100 refuses most of 128 clients

CONFIG = f"""
minWorkers: {WORKERS}
maxWorkers: {WORKERS}
batchSize: {MAX_BATCH}
maxBatchDelay: {MAX_BATCH_DELAY_MS}
responseTimeout: {TIMEOUT_S}
"""

# TorchServe's own logging writes a line and several metrics a request. No peer logs requests.
LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration><Appenders><Console name="console"/></Appenders>
<Loggers><Root level="warn"><AppenderRef ref="console"/></Root></Loggers></Configuration>
"""

if __name__ == "__main__":
    folder, here = Path(os.environ["PEER_FOLDER"]), Path(__file__).parent
    binaries = Path(sys.executable).parent
    (folder / "model.yaml").write_text(CONFIG)
    archive = ["--model-name=segment", "--version=1", f"--export-path={folder}"]
    archive += [f"--handler={here}/torchserve_handler.py", f"--config-file={folder}/model.yaml"]
    archive += [f"--extra-files={here}/handler.py"]
    subprocess.run([binaries / "torch-model-archiver", *archive], check=True)
    (folder / "log4j2.xml").write_text(LOGGING)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{PORT}\n"
        f"management_address=http://127.0.0.1:{PORT + 1}\n"
        f"metrics_address=http://127.0.0.1:{PORT + 2}\n"
        f"job_queue_size={QUEUE}\n"
        "disable_token_authorization=true\n"
    )
    binary = binaries / "torchserve"
    arguments = ["--start", "--foreground", f"--model-store={folder}", "--models=segment.mar"]
    arguments += [f"--ts-config={folder / 'config.properties'}", "--disable-token-auth"]
    arguments += [f"--log-config={folder / 'log4j2.xml'}"]
    os.chdir(folder)
    os.environ["PATH"] = f"{binaries}:{os.environ['PATH']}"
    os.execve(binary, [str(binary), *arguments], os.environ)
