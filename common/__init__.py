"""What every command needs and no library has: files replaced whole, CSV cells, help, progress."""
