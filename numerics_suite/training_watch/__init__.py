"""The watch: the same eyes inside real training, at next to no cost; one bad value ends in a finding and a bundle."""
