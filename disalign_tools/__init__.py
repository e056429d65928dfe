"""Tools around the packages: they need torch and numpy, and a framework only if they are given its files."""
