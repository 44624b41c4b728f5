"""A bundle: everything that proves and explains an export in one folder or zip, for a machine without foldexport.

`place`: put in place whole or not at all.  `golden`: inputs and outputs as arrays.  `card`: README.md from the manifest.
`recipe`: the card's preprocessing, in numpy and Pillow.  `contents`: the files together.  `opened`: a bundle that is verified.
`standalone`: what lies in the bundle as verify.py.
"""

MARK = "Written by foldexport"  # in the docstring of every verify.py
CARD, GOLDEN, SUMS, VERIFY = "README.md", "golden.npz", "SHA256SUMS", "verify.py"
OWN = (CARD, GOLDEN, SUMS, VERIFY)
