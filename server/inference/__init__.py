"""From a photo's bytes to its lesion's probability: admission, decode, queue, batch, network.

No web framework is known here: archives and any program use it as the HTTP service does.
"""
