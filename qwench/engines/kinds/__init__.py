"""What differs between kinds of engine; one file a kind."""
