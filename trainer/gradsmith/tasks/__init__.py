"""What can be learned: a folder or a file each."""
