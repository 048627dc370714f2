"""One network for several processes: feeders speak HTTP and decode, the owner runs the network.

A feeder copies a photo's pixels into a slot of memory that it shares with the owner (`memory`), and
tells it the slot's number over a Unix socket (`messages`). The owner runs the photo in one batch
with those of other feeders, straight from the slots. It writes the probability into the same slot
and tells the feeder so. What is told in one turn of an event loop goes in one write.

It is hand-written because libraries that share memory between processes know neither deadlines nor
clients that leave, and those that do (Ray, Triton) bring servers of their own.
"""
