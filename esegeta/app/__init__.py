"""The local web page: choose a network and images, choose methods, run them, look at the maps."""
