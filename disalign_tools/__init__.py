"""Tools around the packages: they need torch and numpy, and a framework only where one is asked for."""
