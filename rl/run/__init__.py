"""What one run leaves in its folder and says while it goes on."""
