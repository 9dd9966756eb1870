"""The modules that training, prediction and the tools share; to change a recipe, nobody needs to open them."""
