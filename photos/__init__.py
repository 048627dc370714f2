"""What photos, pixels, regions and masks are, for training and serving alike.

From the bytes of a photo to the network's pixels, and from its probabilities to a mask, its
outline and its figures. Nothing here knows the network, HTTP or where a photo comes from.
"""
