"""The control: plain FastAPI with ONNX Runtime, no batching.

https://fastapi.tiangolo.com/deployment/server-workers/: a process for each core. An endpoint
without `async` runs in a thread, so that decoding does not hold up the event loop.
"""

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Response
from handler import PORT, WORKERS, decode, encode, load

app = FastAPI()
if __name__ != "__main__":
    network = load()


@app.post("/segment")
def segment(photo: bytes = Body(media_type="image/jpeg")) -> Response:
    """Turn a photo into its mask."""
    try:
        pixels, size = decode(photo)
    except OSError as error:
        raise HTTPException(422, "not an image") from error
    return Response(encode(network(pixels[None])[0], size), media_type="image/png")


if __name__ == "__main__":
    uvicorn.run("fastapi_app:app", port=PORT, workers=WORKERS, access_log=False)
