"""What a protector is compared with: one file per method."""
