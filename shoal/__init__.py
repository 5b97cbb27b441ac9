"""What every part of Shoal and its users share: contracts, settings, errors, limits, the command."""
