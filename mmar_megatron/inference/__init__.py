"""Generation in both directions: text to image, image to text."""
