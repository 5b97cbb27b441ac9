"""What storage nodes are asked over the wire; generated from proto/shoal/node."""
