"""What devices offer: precision recipes, arithmetic switches, random states, memory, events; the only folder that names them."""
