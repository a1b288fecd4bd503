"""What protects: adversaries, attacks, compared methods, verdicts. The product never imports it."""
