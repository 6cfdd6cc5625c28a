"""What `init` puts into a user's repository: a section, a workflow, and rules for what git keeps."""
