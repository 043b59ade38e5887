"""What single frameworks need."""
