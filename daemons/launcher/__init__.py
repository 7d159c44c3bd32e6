"""Starting, watching and stopping domains: the part of xl, xenstore and the domain builder."""
