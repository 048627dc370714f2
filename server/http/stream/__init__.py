"""Frames of a camera in, masks out, over a WebSocket."""
