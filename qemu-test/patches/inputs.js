// What a patch is given.
return {
  texts: sup.input.texts,
  first: sup.input.text,
  file: [sup.input.file.filename, sup.input.file.size],
  nothing: sup.input.video === undefined,
  image: `${sup.input.image instanceof SupImage} ${sup.input.image.mimeType}`,
};
