"""What a cluster must have before a long run: checked in minutes, on one page."""
