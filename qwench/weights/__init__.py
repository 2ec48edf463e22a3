"""How the trained weights reach the engines that sample with them."""
