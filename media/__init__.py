"""Files in and out: pictures, and writing that never leaves half a file."""
