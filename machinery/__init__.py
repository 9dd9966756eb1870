"""What training, prediction and the tools stand on; to change a recipe, nobody needs to open it."""
