"""fastrdm: non-contrastive self-supervised learning, fast, with the rank of both branches in sight."""
