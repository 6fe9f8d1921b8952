"""The few lines that other training frameworks need; each module wants its framework installed."""
