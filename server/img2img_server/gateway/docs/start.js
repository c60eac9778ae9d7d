// The gateway puts KEY before this: the development key, or nothing.
const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  onComplete: () => KEY && ui.preauthorizeApiKey("x_api_key", KEY),
});
