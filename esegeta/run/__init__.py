"""From a configuration and images to maps, figures and a report: the only part that touches files."""
