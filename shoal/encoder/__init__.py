"""What encoders are asked over the wire; generated from proto/shoal/encoder."""
