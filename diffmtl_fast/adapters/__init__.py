"""The few lines that other frameworks need."""
