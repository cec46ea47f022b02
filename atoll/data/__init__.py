"""Sources of captioned images, and the stage that encodes them."""
