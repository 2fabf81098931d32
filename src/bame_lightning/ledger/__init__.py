"""What training costs: count one forward pass, book every step."""
