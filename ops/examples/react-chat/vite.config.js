import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// While developing, the page and Sluice share an origin by this proxy, as they do behind nginx in production. The Host
// header stays what the browser sent, or Sluice would take the page for one of another origin and refuse it.
const proxy = {
  "/api": { target: process.env.SLUICE_URL ?? "http://127.0.0.1:4001", changeOrigin: false },
};

export default defineConfig({
  base: "./", // the built page works under any path
  plugins: [react()],
  server: { proxy },
  preview: { proxy },
});
