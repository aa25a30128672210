"""What an array is: formats, libraries, dispatch and checks."""
