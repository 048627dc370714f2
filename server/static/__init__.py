"""The page as plain files that need no server: the network runs in the browser."""
