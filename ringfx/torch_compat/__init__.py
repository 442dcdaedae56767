"""What ringfx needs of torch beyond its public interface, and what differs between releases."""
