/**
 * The only place where elements are made. Data enters the page as text nodes and attributes, never as markup.
 */

/** The element with this id; its absence is a mistake in index.html and fails loudly. */
export function part(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`index.html has no element #${id}`);
  return found;
}

/**
 * A new element.
 * @param {string} tag
 * @param {Object<string, string>} [attributes]
 * @param {...(Node|string)} children strings become text nodes
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Sets the text of a node, only when it differs: selections and screen readers stay undisturbed. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Sets or removes (null) an attribute, only when it differs. */
export function mark(node, attribute, value) {
  if (node.getAttribute(attribute) === value) return;
  if (value === null) node.removeAttribute(attribute);
  else node.setAttribute(attribute, value);
}
