"""``disalign doctor``; its own process imports the standard library only."""
