"""Images from files, on their way to a network and back."""
