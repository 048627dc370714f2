"""From a photo's bytes to its lesion's probability: admission, decoding, queue, batch, network.

It uses no web framework, so `server.bulk` and other programs use it as the HTTP service does.
"""
