"""The one definition of a sign and of a packed bit."""
