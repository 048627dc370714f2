"""Photos, pixels, regions and masks, for training and serving alike.

A photo's bytes become the network's pixels, and its probabilities become a mask with outline and
figures. Nothing here depends on the network, on HTTP or on where a photo comes from.
"""
